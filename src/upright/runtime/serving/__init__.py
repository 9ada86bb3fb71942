"""``upright serve``: a bundle over HTTP. `batching` knows no HTTP, `protocol` no server."""
