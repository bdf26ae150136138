/* Calls a function through code that it writes itself, as Python's trampolines do, and writes down its name. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

static volatile int sink;

static void phase(long number) { syscall(SYS_prctl, 0x706c756d, number, 0, 0, 0); }

__attribute__((noinline, noclone)) static int leak(void) {
    int fd = open("/etc/hostname", O_RDONLY); /* MARK leak */
    sink = fd;
    return fd;
}

int main(int argc, char **argv) {
    int rounds = argc > 1 ? atoi(argv[1]) : 1;
    /* sub $8,%rsp; call *%rdi; add $8,%rsp; ret */
    static const unsigned char bare[] = {0x48, 0x83, 0xec, 8, 0xff, 0xd7, 0x48, 0x83, 0xc4, 8, 0xc3};
    /* push %rbp; mov %rsp,%rbp; call *%rdi; nop; leave; ret */
    static const unsigned char framed[] = {0x55, 0x48, 0x89, 0xe5, 0xff, 0xd7, 0x90, 0xc9, 0xc3};
    unsigned char *code = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    memcpy(code, bare, sizeof bare);
    memcpy(code + 64, framed, sizeof framed);
    mprotect(code, 4096, PROT_READ | PROT_EXEC);
    char name[64];
    snprintf(name, sizeof name, "/tmp/perf-%d.map", getpid());
    FILE *map = fopen(name, "w");
    fprintf(map, "%lx 40 py::old:/srv/app.py\n", (long)code);
    fprintf(map, "%lx 40 py::Pool.get:/srv/app.py\n", (long)code);
    fprintf(map, "0x%lx 0x40 JS:*handle /srv/app.js:12:3\n", (long)code + 64);
    fclose(map);
    for (int round = 0; round < rounds; round++)
        for (int which = 0; which < 2; which++) {
            phase(which);
            int fd = ((int (*)(int (*)(void)))(code + 64 * which))(leak); /* MARK call */
            phase(-1);
            close(fd);
        }
    unlink(name);
    return 0;
}
