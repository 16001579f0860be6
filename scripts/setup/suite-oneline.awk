# From a one-line source file: the first line that carries the suite `from` itself, with the suite changed to `to`.
# Ends with 1 when there is none.
$1 == "deb" && !found {
    options = ""
    i = 2
    if ($2 ~ /^\[/) {
        while (i <= NF) { options = options $i " "; if ($(i++) ~ /\]$/) break }
    }
    address = $i; suite = $(i + 1); main = 0
    for (j = i + 2; j <= NF; j++) if ($j == "main") main = 1
    if (suite != from || !main) next
    print "deb " options address " " to " main"
    found = 1
}
END { exit !found }
