// Opens 300 files at once and closes them over half a minute, then rests for a minute.
#include "common.h"

#define FILES 300

int main(int argc, char **argv)
{
    int files[FILES];
    end_after(argc, argv);
    for (;;) {
        wait_seconds(20);
        for (int i = 0; i < FILES; i++) {
            files[i] = open_file("/etc/hostname");
        }
        for (int i = 0; i < FILES; i++) {
            wait_seconds(0.1);
            close(files[i]);
        }
        wait_seconds(40);
    }
}
