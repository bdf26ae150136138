// Opens a file a second and starts itself anew every 20 s, as a server that is told to reload.
#include "common.h"

int main(int argc, char **argv)
{
    // The alarm of the first image holds for those that come after it.
    if (getenv("RELOADED") == NULL) {
        end_after(argc, argv);
        check(setenv("RELOADED", "1", 1), "setenv");
    }
    for (int i = 0; i < 20; i++) {
        open_file("/etc/hostname");
        wait_seconds(1);
    }
    execv("/proc/self/exe", argv);
    perror("execv");
    return 1;
}
