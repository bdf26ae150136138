#!/bin/bash
# Writes five logs. Every second one of them is closed, renamed and opened anew.

logs=()

open_log() {
    exec {fd}>>"log.$1"
    logs[$1]=$fd
}

rotate() {
    local fd=${logs[$1]}
    exec {fd}>&-
    mv "log.$1" "log.$1.old"
    open_log "$1"
}

for number in 0 1 2 3 4; do
    open_log $number
done
while ((SECONDS < $1)); do
    for fd in "${logs[@]}"; do
        echo "at $SECONDS" >&"$fd"
    done
    rotate $((SECONDS % 5))
    sleep 1
done
