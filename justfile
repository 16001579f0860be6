# Short names for ./run. `just` lists them.

default:
    @just --list --unsorted

# ruff, mypy, import-linter, generated code is current, unit, property and sim tests
check:
    ./run test fast

# let ruff format and mend the source
format:
    ./run format

# write the generated code again from proto/
gen:
    ./run gen

# everything with real VMs that CI's first half runs (root)
test *level:
    ./run test {{level}}

# move a running VM between two hosts on this machine and prove it (root)
demo *options:
    ./run demo {{options}}

# measure against a peer: just bench migration
bench name *options:
    ./run bench {{name}} {{options}}
