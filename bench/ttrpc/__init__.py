"""ttrpc against grpcio (aio), grpclib and Go's ttrpc, in one run on one machine."""
