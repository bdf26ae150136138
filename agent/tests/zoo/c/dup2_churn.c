// Ten times a second opens some files, moves them to the numbers of others and drops them in ranges.
#include "common.h"
#include <sys/syscall.h>

#define FILES 20
#define FIRST 100

// close_range of Linux 5.9; glibc has had it since 2.34.
static void close_numbers(unsigned first, unsigned last)
{
    check((int)syscall(SYS_close_range, first, last, 0), "close_range");
}

int main(int argc, char **argv)
{
    end_after(argc, argv);
    for (unsigned round = 0;; round++) {
        int wanted = 1 + rand() % FILES;
        for (int i = 0; i < wanted; i++) {
            int fd = open_file(round % 2 == 0 ? "/etc/hostname" : "/proc/self/stat");
            check(dup2(fd, FIRST + i), "dup2");
            if (i % 2 == 0) {
                close(fd);
            }
        }
        wait_seconds(0.1);
        if (round % 3 == 2) {
            close_numbers(3, FIRST + FILES);
        } else {
            close_numbers(3, FIRST - 1);
        }
    }
}
