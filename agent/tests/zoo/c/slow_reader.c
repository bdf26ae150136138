// Remembers the highest load. Leaks the fd of each reading.
#include "common.h"

NAMED double read_load(void)
{
    char text[64] = "";
    int fd = open_file("/proc/loadavg");
    check((int)read(fd, text, sizeof text - 1), "read");
    return atof(text);
}

NAMED void sample_loop(void)
{
    double highest = 0;
    for (;;) {
        double load = read_load();
        if (load > highest) {
            highest = load;
            printf("highest load %.2f\n", highest);
        }
        wait_seconds(10);
    }
}

int main(int argc, char **argv)
{
    end_after(argc, argv);
    sample_loop();
}
