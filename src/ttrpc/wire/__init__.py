"""ttrpc's envelope, generated from proto/ttrpc."""
