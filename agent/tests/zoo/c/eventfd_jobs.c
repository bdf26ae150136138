// Awaits each job through an eventfd. Leaks all of them.
#include "common.h"
#include <stdint.h>
#include <sys/eventfd.h>

struct job {
    int done;
    double seconds;
};

static void *work(void *argument)
{
    struct job *job = argument;
    wait_seconds(job->seconds);
    check(eventfd_write(job->done, 1), "eventfd_write");
    return NULL;
}

NAMED void start_job(struct job *job)
{
    job->done = check(eventfd(0, EFD_CLOEXEC), "eventfd"); // leak
    start_thread(work, job);
}

NAMED void job_loop(void)
{
    for (;;) {
        eventfd_t count;
        struct job job = {.seconds = 0.1};
        start_job(&job);
        check(eventfd_read(job.done, &count), "eventfd_read");
        wait_seconds(0.9);
    }
}

int main(int argc, char **argv)
{
    end_after(argc, argv);
    job_loop();
}
