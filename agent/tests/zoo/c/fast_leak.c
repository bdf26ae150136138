// Loads assets, 200 a second, as a server that has raised its limit. Leaks them all.
#include "common.h"
#include <sys/resource.h>

NAMED int open_asset(void)
{
    int fd = open("/etc/hostname", O_RDONLY | O_CLOEXEC); // leak
    if (fd < 0 && errno != EMFILE) {
        check(fd, "open");
    }
    return fd;
}

NAMED void load_assets(void)
{
    for (;;) {
        for (int i = 0; i < 10; i++) {
            char text[64];
            int asset = open_asset();
            // At the limit it does without.
            if (asset >= 0) {
                check((int)read(asset, text, sizeof text), "read");
            }
        }
        wait_seconds(0.05);
    }
}

int main(int argc, char **argv)
{
    struct rlimit limit;
    end_after(argc, argv);
    check(getrlimit(RLIMIT_NOFILE, &limit), "getrlimit");
    limit.rlim_cur = limit.rlim_max;
    check(setrlimit(RLIMIT_NOFILE, &limit), "setrlimit");
    load_assets();
}
