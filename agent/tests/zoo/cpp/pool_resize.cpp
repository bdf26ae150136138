// A thread pool that follows its load: 4, then 32, then 8, then 32 threads.
#include "../c/common.h"
#include <atomic>
#include <thread>

static std::atomic<int> wanted{0};
static std::atomic<int> alive{0};

// Takes its own place away when there are too many.
static bool is_superfluous()
{
    int before = alive;
    return before > wanted && alive.compare_exchange_strong(before, before - 1);
}

static void work()
{
    while (!is_superfluous()) {
        wait_seconds(0.2);
    }
}

static void resize(int threads)
{
    wanted = threads;
    while (alive < wanted) {
        alive++;
        std::thread(work).detach();
        wait_seconds(0.2);
    }
}

int main(int argc, char **argv)
{
    end_after(argc, argv);
    resize(4);
    wait_seconds(30);
    for (;;) {
        resize(32);
        wait_seconds(30);
        resize(8);
        wait_seconds(30);
    }
}
