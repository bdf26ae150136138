// A child per connection, with a pipe over which it reports. Both are gone when the child ends.
#include "common.h"
#include <poll.h>

#define MOST 64

// 0 is the listener, the others are the pipes of children.
static struct pollfd polled[MOST];
static nfds_t used;

static void serve_client(int connection, int report)
{
    char buffer[64];
    check((int)read(connection, buffer, sizeof buffer), "read");
    wait_seconds(1 + 2 * atof(buffer));
    check((int)write(connection, "done", 4), "write");
    check((int)write(report, "1", 1), "write");
    _exit(0);
}

static void start_child(int listener)
{
    int ends[2];
    int connection = check(accept4(listener, NULL, NULL, SOCK_CLOEXEC), "accept");
    check(pipe2(ends, O_CLOEXEC), "pipe2");
    if (fork_child() == 0) {
        serve_client(connection, ends[1]);
    }
    close(connection);
    close(ends[1]);
    polled[used++] = (struct pollfd){.fd = ends[0], .events = POLLIN};
}

static void end_child(nfds_t index)
{
    char report;
    check((int)read(polled[index].fd, &report, 1), "read");
    close(polled[index].fd);
    polled[index] = polled[--used];
    check(waitpid(-1, NULL, 0), "waitpid");
}

// Four times a second a client in a process of its own, which waits for its answer.
static void send_clients(const struct sockaddr_in *address)
{
    signal(SIGCHLD, SIG_IGN);
    for (;;) {
        double patience = uniform();
        if (fork_child() == 0) {
            char text[64];
            int connection = connected_socket(address);
            int length = snprintf(text, sizeof text, "%f", patience);
            check((int)write(connection, text, (size_t)length), "write");
            check((int)read(connection, text, sizeof text), "read");
            _exit(0);
        }
        wait_seconds(0.5 * uniform());
    }
}

int main(int argc, char **argv)
{
    struct sockaddr_in address;
    end_after(argc, argv);
    int listener = listening_socket(&address);
    if (fork_child() == 0) {
        send_clients(&address);
    }
    polled[used++] = (struct pollfd){.fd = listener, .events = POLLIN};
    for (;;) {
        check(poll(polled, used, -1), "poll");
        for (nfds_t i = used; --i > 0;) {
            if (polled[i].revents != 0) {
                end_child(i);
            }
        }
        if (polled[0].revents != 0 && used < MOST) {
            start_child(listener);
        }
    }
}
