# shellcheck shell=sh
# shellcheck disable=SC2154 # `distribution_id` and `distribution_codename` are set by system.sh
# Real containerds for the tests, from the distribution's packages, unpacked into .cache/containerd and never installed: no service
# is started and nothing of the machine changes. .cache/containerd/new is 2.1 or newer, middle is 1.7 and old 1.6 (where the archive
# has them), tools has runc and the CNI plugins.

CONTAINERD=.cache/containerd
CONTAINERD_MIN=2.1
CONTAINERD_SUITE=forky         # Debian's first with 2.1; its containerd needs no newer libc than Debian 12's (its runc does)
CONTAINERD_MIDDLE_SUITE=trixie # the one with 1.7, of which the same is true

containerds() {
    containerds_key=$(cat scripts/setup/containerd.sh "$OS_RELEASE" | sha256sum | cut -c1-16)
    [ ! -e "$CONTAINERD/made-$containerds_key" ] || return 0
    say "fetching containerd, runc and the CNI plugins into $CONTAINERD"
    room_for "$PWD" 700 "the containerds"
    containerds_missing=$(missing_packages tc:iproute2)
    # shellcheck disable=SC2086
    [ -z "$containerds_missing" ] || install_packages $containerds_missing
    rm -rf "$CONTAINERD"
    mkdir -p "$CONTAINERD"
    case $distribution_id:$distribution_codename in
    debian:bookworm) newer=$CONTAINERD_SUITE middle=$CONTAINERD_MIDDLE_SUITE old=bookworm own=bookworm ;;
    debian:trixie) newer=$CONTAINERD_SUITE middle=$CONTAINERD_MIDDLE_SUITE old='' own=trixie ;;
    *) newer='' middle='' old='' own='' ;; # newer distributions have it themselves, and no old one
    esac
    private_packages new "$own" "$newer" containerd
    [ -z "$middle" ] || private_packages middle "$own" "$middle" containerd
    [ -z "$old" ] || private_packages old "$own" "$old" containerd
    private_packages tools "$own" "$own" runc containernetworking-plugins
    version_at_least "$(containerd_version new)" "$CONTAINERD_MIN" ||
        die "containerd $CONTAINERD_MIN or newer is needed for the tests and the packages have \"$(containerd_version new)\""
    [ -z "$middle" ] || [ "$(containerd_version middle)" = 1.7 ] ||
        die "containerd 1.7 is needed for the tests and $middle has \"$(containerd_version middle)\""
    : >"$CONTAINERD/made-$containerds_key"
}

# containerd_version FOLDER: "2.1" of what was unpacked there
containerd_version() {
    "$CONTAINERD/$1/usr/bin/containerd" --version | sed -E 's/.* v?([0-9]+\.[0-9]+)[^ ]* .*/\1/; s/.* v?([0-9]+\.[0-9]+).*/\1/'
}

# private_packages FOLDER OWN SUITE PACKAGE...: unpacks packages of SUITE, from the archive that this machine takes OWN from, into
# .cache/containerd/FOLDER; with no SUITE those that the machine's own sources have. Needs no root.
private_packages() {
    private=$PWD/$CONTAINERD/$1
    mkdir -p "$private" "$private.apt/sources" "$private.apt/state/lists/partial" "$private.apt/cache/archives/partial"
    private_options="-o Dir::State=$private.apt/state -o Dir::State::status=/var/lib/dpkg/status -o Dir::Cache=$private.apt/cache -o APT::Sandbox::User=$(id -un)"
    if [ -n "$3" ]; then
        private_source "$2" "$3"
        private_options="$private_options -o Dir::Etc::sourcelist=/dev/null -o Dir::Etc::sourceparts=$private.apt/sources"
    fi
    shift 3
    # shellcheck disable=SC2086
    quietly "$STATE/containerd-update.log" "the package lists for $* could not be read; check the network, then run this again" \
        apt-get $private_options update
    # shellcheck disable=SC2086,SC2016 # split on purpose; the inner shell expands
    quietly "$STATE/containerd-download.log" "$* could not be fetched; check the network, then run this again" \
        sh -c 'cd "$1" && shift && exec apt-get "$@"' sh "$private.apt" $private_options download "$@"
    for private_package in "$private.apt"/*.deb; do
        dpkg -x "$private_package" "$private"
    done
    rm -rf "$private.apt"
}

# private_source OWN SUITE
private_source() {
    suite_source "$1" "$2" "$private.apt/found" ||
        die "no source of Debian $1 was found under /etc/apt to take $2 from: the containerds for the tests come from there"
    mv "$private.apt/found" "$private.apt/sources/found.$suite_kind"
}
