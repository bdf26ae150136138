// A session per two seconds, each with a thread that tries to connect until it succeeds. It never does.
#include "../c/common.h"
#include <thread>

static sockaddr_in upstream;

NAMED void connect_with_retry()
{
    for (;;) {
        int fd = check(socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0), "socket");
        int result = connect(fd, reinterpret_cast<sockaddr *>(&upstream), sizeof upstream);
        close(fd);
        if (result == 0) {
            return;
        }
        wait_seconds(1);
    }
}

NAMED void open_session()
{
    std::thread(connect_with_retry).detach(); // leak
}

NAMED void session_loop()
{
    for (;;) {
        open_session();
        wait_seconds(2);
    }
}

int main(int argc, char **argv)
{
    end_after(argc, argv);
    // Bound, so that the port is nobody else's, but not listening.
    bound_socket(&upstream);
    session_loop();
}
