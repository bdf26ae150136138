// Polls an upstream each second through a Poller. Leaks its epoll fd: the class has no destructor.
#include "../c/common.h"
#include <sys/epoll.h>

class Poller {
public:
    NAMED Poller() : epoll(check(epoll_create1(EPOLL_CLOEXEC), "epoll_create1")) {} // leak

    void add(int fd)
    {
        epoll_event event{};
        event.events = EPOLLIN;
        check(epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &event), "epoll_ctl");
    }

    bool wait(int milliseconds)
    {
        epoll_event event{};
        return check(epoll_wait(epoll, &event, 1, milliseconds), "epoll_wait") > 0;
    }

private:
    int epoll;
};

NAMED bool poll_upstream(int upstream)
{
    Poller poller;
    poller.add(upstream);
    return poller.wait(1000);
}

int main(int argc, char **argv)
{
    end_after(argc, argv);
    sockaddr_in address;
    int listener = listening_socket(&address);
    while (!poll_upstream(listener)) {
        puts("the upstream is silent");
    }
}
