// Calls into the library.
#include <cstdlib>
#include <sys/syscall.h>
#include <unistd.h>

int get(const char *path);
long stream(const char *path);

static void phase(long number) { syscall(SYS_prctl, 0x706c756d, number, 0, 0, 0); }

int main(int argc, char **argv) {
    int rounds = argc > 1 ? atoi(argv[1]) : 1;
    long sum = 0;
    for (int round = 0; round < rounds; round++) {
        phase(0);
        int fd = get("/etc/hostname"); // MARK call get
        phase(1);
        sum += stream("/etc/hostname"); // MARK call stream
        phase(-1);
        close(fd);
    }
    return sum == 1;
}
