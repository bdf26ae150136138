// A worker answers over a socketpair and closes its end. The dispatcher leaks the other.
#include "../c/common.h"
#include <thread>

static void work(int end)
{
    wait_seconds(0.1);
    check(static_cast<int>(write(end, "done", 4)), "write");
    close(end);
}

NAMED void run_task()
{
    int ends[2];
    char answer[16];
    check(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends), "socketpair"); // leak
    std::thread worker(work, ends[1]);
    check(static_cast<int>(read(ends[0], answer, sizeof answer)), "read");
    worker.join();
}

NAMED void dispatch_loop()
{
    for (;;) {
        run_task();
        wait_seconds(0.4);
    }
}

int main(int argc, char **argv)
{
    end_after(argc, argv);
    dispatch_loop();
}
