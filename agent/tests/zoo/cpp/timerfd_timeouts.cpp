// Arms a timer per request and cancels it with the answer. Leaks the timer, which stays in the list.
#include "../c/common.h"
#include <memory>
#include <sys/timerfd.h>
#include <vector>

class Timeout {
public:
    explicit Timeout(int fd) : fd(fd) {}
    Timeout(const Timeout &) = delete;
    ~Timeout() { close(fd); }

    // 0 cancels it.
    void set(time_t seconds)
    {
        itimerspec when{};
        when.it_value.tv_sec = seconds;
        check(timerfd_settime(fd, 0, &when, nullptr), "timerfd_settime");
    }

private:
    int fd;
};

static std::vector<std::unique_ptr<Timeout>> timeouts;

NAMED Timeout &arm_timeout(time_t seconds)
{
    int fd = check(timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC), "timerfd_create"); // leak
    timeouts.push_back(std::make_unique<Timeout>(fd));
    timeouts.back()->set(seconds);
    return *timeouts.back();
}

NAMED void request_loop()
{
    for (;;) {
        Timeout &timeout = arm_timeout(30);
        wait_seconds(0.2);
        timeout.set(0);
        wait_seconds(0.8);
    }
}

int main(int argc, char **argv)
{
    end_after(argc, argv);
    request_loop();
}
