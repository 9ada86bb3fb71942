"""Source -> splits -> uint8 batches: one datamodule class per dataset over `datamodule.ImageDataModule`."""
