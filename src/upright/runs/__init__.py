"""What a run is: its folder, its callbacks, how it is resumed, and the commands of Lightning's command line."""
