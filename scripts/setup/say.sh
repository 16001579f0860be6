# shellcheck shell=sh
# How the set-up talks: one line each, on stderr.

say() { printf 'run: %s\n' "$*" >&2; }

# With --json a set-up that refuses is one object on the command's own stdout (descriptor 3), as when the command itself fails.
die() {
    printf 'run: %s\n' "$*" >&2
    [ -z "${json:-}" ] || printf '{"ok": false, "error": "%s", "code": "FAILED_PRECONDITION"}\n' "$(escaped "$*")" >&3
    exit 1
}

# escaped TEXT: as it stands between the quotes of a JSON string.
escaped() { printf '%s' "$1" | tr '\t\n\r' '   ' | tr -d '\001-\037' | sed 's/\\/\\\\/g; s/"/\\"/g'; }

# quietly LOG WHAT COMMAND...: runs it with its output in LOG; when it fails, WHAT and the output's last complaint are one line.
quietly() {
    quiet_log=$1
    quiet_what=$2
    shift 2
    mkdir -p "$(dirname "$quiet_log")"
    "$@" >"$quiet_log" 2>&1 </dev/null || {
        quiet_complaint=$(grep -aE '^[[:space:]]*(E:|W:|ERROR|[Ee]rror)' "$quiet_log" | tail -n 1 | cut -c 1-200)
        [ -n "$quiet_complaint" ] || quiet_complaint=$(tail -n 1 "$quiet_log" | cut -c 1-200)
        die "$quiet_what: \"$quiet_complaint\" (all of it: $quiet_log)"
    }
}

has() { command -v "$1" >/dev/null 2>&1; }

# room_for FOLDER MIB WHAT: the disk under FOLDER (or its nearest parent) has that much left.
room_for() {
    room_folder=$1
    while [ ! -d "$room_folder" ]; do room_folder=$(dirname "$room_folder"); done
    room_free_mib=$(df -Pm "$room_folder" | awk 'NR == 2 {print $4}')
    [ "${room_free_mib:-0}" -ge "$2" ] ||
        die "$3 needs $2 MiB under $1 and $room_free_mib MiB are free: make room there"
}
