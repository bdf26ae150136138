#!/bin/bash
# Copies an entry of its journal each second. Leaks the fd that it reads from.

record_entry() {
    exec {journal}</etc/hostname
    read -r entry <&"$journal"
    echo "$entry" >entry
}

while ((SECONDS < $1)); do
    record_entry
    sleep 1
done
