// Sessions come in rushes of 60. After each it ends 50 and leaks 10.
#include "common.h"

#define RUSH 60
#define ENDED 50

NAMED int open_session(void)
{
    return check(socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0), "socket"); // leak
}

NAMED void rush(void)
{
    int sessions[RUSH];
    for (int i = 0; i < RUSH; i++) {
        sessions[i] = open_session();
        wait_seconds(0.05);
    }
    for (int i = 0; i < ENDED; i++) {
        close(sessions[i]);
        wait_seconds(0.06);
    }
}

int main(int argc, char **argv)
{
    end_after(argc, argv);
    for (;;) {
        rush();
    }
}
