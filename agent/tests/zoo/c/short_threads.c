// Twenty threads a second; each works for less than one.
#include "common.h"

static void *work(void *argument)
{
    wait_seconds((double)(long)argument / 1000);
    return NULL;
}

int main(int argc, char **argv)
{
    end_after(argc, argv);
    for (;;) {
        start_thread(work, (void *)(long)(1000 * uniform()));
        wait_seconds(0.05);
    }
}
