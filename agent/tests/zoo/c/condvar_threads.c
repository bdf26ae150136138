// A thread per job waits until a result is there. Leaks them: nobody signals the condition.
#include "common.h"

static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t changed = PTHREAD_COND_INITIALIZER;
static int results;

NAMED void *wait_for_result(void *argument)
{
    pthread_mutex_lock(&mutex);
    while (results == 0) {
        pthread_cond_wait(&changed, &mutex);
    }
    results--;
    pthread_mutex_unlock(&mutex);
    return argument;
}

NAMED void submit_job(void)
{
    start_thread(wait_for_result, NULL);
}

NAMED void job_loop(void)
{
    for (;;) {
        submit_job();
        wait_seconds(1);
    }
}

int main(int argc, char **argv)
{
    end_after(argc, argv);
    job_loop();
}
