"""``upright serve``: a bundle over HTTP. `batching` is independent of HTTP, and `protocol` of the server."""
