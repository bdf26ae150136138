// A server with poll. Forgets a client that has closed, without closing its own side.
#include "common.h"
#include <poll.h>

#define MOST 64

static struct pollfd polled[MOST];
static nfds_t used;

NAMED void accept_client(int listener)
{
    int connection = check(accept4(listener, NULL, NULL, SOCK_CLOEXEC), "accept"); // leak
    if (used < MOST) {
        polled[used++] = (struct pollfd){.fd = connection, .events = POLLIN};
    } else {
        close(connection);
    }
}

static void forget_client(nfds_t index)
{
    polled[index] = polled[--used];
}

NAMED void serve(int listener)
{
    polled[used++] = (struct pollfd){.fd = listener, .events = POLLIN};
    for (;;) {
        check(poll(polled, used, -1), "poll");
        for (nfds_t i = used; --i > 0;) {
            char buffer[256];
            if (polled[i].revents == 0) {
                continue;
            }
            ssize_t length = read(polled[i].fd, buffer, sizeof buffer);
            if (length <= 0 || write(polled[i].fd, buffer, (size_t)length) < 0) {
                forget_client(i);
            }
        }
        if (polled[0].revents != 0) {
            accept_client(listener);
        }
    }
}

static void talk_for_ever(const struct sockaddr_in *address)
{
    for (;;) {
        char answer[256];
        int connection = connected_socket(address);
        check((int)write(connection, "hello", 5), "write");
        check((int)read(connection, answer, sizeof answer), "read");
        wait_seconds(0.2);
        close(connection);
        wait_seconds(0.3);
    }
}

int main(int argc, char **argv)
{
    struct sockaddr_in address;
    end_after(argc, argv);
    int listener = listening_socket(&address);
    if (fork_child() == 0) {
        talk_for_ever(&address);
    }
    serve(listener);
}
