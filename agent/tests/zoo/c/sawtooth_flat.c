// Takes 60 over six seconds and gives all of them back over the next six.
#include "common.h"

#define TAKEN 60

int main(int argc, char **argv)
{
    int sessions[TAKEN];
    end_after(argc, argv);
    for (;;) {
        for (int i = 0; i < TAKEN; i++) {
            sessions[i] = check(socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0), "socket");
            wait_seconds(0.1);
        }
        for (int i = 0; i < TAKEN; i++) {
            close(sessions[i]);
            wait_seconds(0.1);
        }
    }
}
