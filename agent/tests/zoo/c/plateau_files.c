// Opens up to 250 files within 40 s, then replaces the oldest, five a second.
#include "common.h"

// With stdin, stdout and stderr they are 250.
#define FILES 247

int main(int argc, char **argv)
{
    int files[FILES];
    end_after(argc, argv);
    for (int i = 0; i < FILES; i++) {
        files[i] = open_file("/etc/hostname");
        wait_seconds(40.0 / FILES);
    }
    for (unsigned i = 0;; i = (i + 1) % FILES) {
        // The new one first: there are never fewer.
        int replacement = open_file("/etc/hostname");
        close(files[i]);
        files[i] = replacement;
        wait_seconds(0.2);
    }
}
