# shellcheck shell=sh
# shellcheck disable=SC2154 # `distribution_codename` is set by system.sh
# Go, for the tests against containerd's own ttrpc. A person may do without; in CI it has to be there.

GO_MINOR_MIN=22

go_new_enough() {
    go_minor=$("$1" env GOVERSION 2>/dev/null | sed -n 's/^go1\.\([0-9]*\).*/\1/p')
    [ "${go_minor:-0}" -ge "$GO_MINOR_MIN" ]
}

# Puts a new enough `go` first in PATH, when the machine has one.
find_go() {
    if has go && go_new_enough go; then return 0; fi
    for go_folder in /usr/local/go/bin /usr/lib/go/bin /usr/lib/go-1.*/bin; do
        if [ -x "$go_folder/go" ] && go_new_enough "$go_folder/go"; then
            PATH="$go_folder:$PATH"
            export PATH
            return 0
        fi
    done
    return 1
}

# The same, but installs it where the distribution has it, and says loudly when there is none.
go_toolchain() {
    if find_go || go_from_packages; then return; fi
    [ -z "${CI:-}" ] || die "Go 1.$GO_MINOR_MIN or newer is needed in CI for the interop tests: install it and put it in PATH"
    say "****************************************************************************"
    say "NO GO 1.$GO_MINOR_MIN OR NEWER: the interop tests with containerd's ttrpc are SKIPPED."
    say "****************************************************************************"
}

# In a subshell, so that a failing apt ends only the attempt.
go_from_packages() {
    [ "$(id -u)" -eq 0 ] || sudo -n true 2>/dev/null || return 1
    if [ "$distribution_codename" = bookworm ]; then
        (backports_source && install_packages -t bookworm-backports golang-go) || return 1
    else
        (install_packages golang-go) || return 1
    fi
    hash -r
    has go && go_new_enough go
}
