"""asyncio around the pure core: sockets, tasks, timers. Everything public of it is exported by `ttrpc`."""
