// Watches its folder for changes. Leaks the old instance with each reload.
#include "common.h"
#include <sys/inotify.h>

NAMED int watch_folder(const char *path)
{
    int fd = check(inotify_init1(IN_CLOEXEC | IN_NONBLOCK), "inotify_init1"); // leak
    check(inotify_add_watch(fd, path, IN_CLOSE_WRITE | IN_MOVED_TO), "inotify_add_watch");
    return fd;
}

NAMED void reload_loop(void)
{
    for (;;) {
        char event[4096];
        int watched = watch_folder(".");
        for (int i = 0; i < 5; i++) {
            wait_seconds(1);
            if (read(watched, event, sizeof event) > 0) {
                puts("changed");
            }
        }
    }
}

int main(int argc, char **argv)
{
    end_after(argc, argv);
    reload_loop();
}
