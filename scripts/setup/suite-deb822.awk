# From a deb822 source file: the first stanza that carries the suite `from` itself, with the suite changed to `to`.
# Ends with 1 when there is none.
BEGIN { RS = ""; FS = "\n"; found = 0 }
{
    if (found) next
    types = suites = components = ""; enabled = 1; kept = ""
    for (i = 1; i <= NF; i++) {
        line = $i
        if (line ~ /^#/) continue
        if (line !~ /^[ \t]/) {
            key = tolower(line); sub(/:.*/, "", key)
            value = line; sub(/^[^:]*:[ \t]*/, "", value)
        } else {
            value = line # a field goes on in an indented line
        }
        if (key == "types") { types = types " " value; continue }
        if (key == "suites") { suites = suites " " value; continue }
        if (key == "components") { components = components " " value; continue }
        if (key == "enabled" && tolower(value) ~ /^(no|false|0)/) enabled = 0
        kept = kept line "\n"
    }
    if (!enabled || !has(types, "deb") || !has(suites, from) || !has(components, "main")) next
    printf "Types: deb\nSuites: %s\nComponents: main\n%s", to, kept
    found = 1
}
END { exit !found }
function has(list, word) { return (" " list " ") ~ ("[ \t]" word "[ \t]") }
