// Draws each frame into a memfd. Unmaps it and leaks the fd.
#include "common.h"
#include <sys/mman.h>

#define BYTES 16384

NAMED int new_frame(void)
{
    int fd = check(memfd_create("frame", MFD_CLOEXEC), "memfd_create"); // leak
    check(ftruncate(fd, BYTES), "ftruncate");
    return fd;
}

NAMED void render_loop(void)
{
    for (int shade = 0;; shade++) {
        int frame = new_frame();
        void *pixels = mmap(NULL, BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, frame, 0);
        if (pixels == MAP_FAILED) {
            perror("mmap");
            exit(1);
        }
        memset(pixels, shade, BYTES);
        munmap(pixels, BYTES);
        wait_seconds(0.5);
    }
}

int main(int argc, char **argv)
{
    end_after(argc, argv);
    render_loop();
}
