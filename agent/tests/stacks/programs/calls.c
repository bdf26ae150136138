/* Makes every kind of fd, and threads, each from a function of its own. `MARK name` names the line of the call.
   With a second argument each round waits for a byte on stdin, and the end of that is its end. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <netinet/in.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

#define OWN __attribute__((noinline, noclone))

/* Tells the tracer what comes next. */
static void phase(long number) { syscall(SYS_prctl, 0x706c756d, number, 0, 0, 0); }

static int listener;
static struct sockaddr_in address;
static volatile long sink;

static void *idle(void *unused) { return unused; }

OWN static int call_open(void) {
    int fd = open("/dev/null", O_RDONLY); /* MARK open */
    sink += fd;
    return fd;
}

OWN static int call_fopen(void) {
    FILE *file = fopen("/dev/null", "r"); /* MARK fopen */
    int fd = dup(fileno(file));
    fclose(file);
    return fd;
}

OWN static int call_socket(void) {
    int fd = socket(AF_INET, SOCK_STREAM, 0); /* MARK socket */
    sink += fd;
    return fd;
}

OWN static int call_accept(void) {
    int fd = accept(listener, NULL, NULL); /* MARK accept */
    sink += fd;
    return fd;
}

OWN static int call_pipe(void) {
    int fds[2] = {-1, -1};
    sink += pipe(fds); /* MARK pipe */
    close(fds[1]);
    return fds[0];
}

OWN static int call_dup(void) {
    int fd = dup(0); /* MARK dup */
    sink += fd;
    return fd;
}

OWN static int call_eventfd(void) {
    int fd = eventfd(0, 0); /* MARK eventfd */
    sink += fd;
    return fd;
}

OWN static int call_epoll_create(void) {
    int fd = epoll_create(1); /* MARK epoll_create */
    sink += fd;
    return fd;
}

OWN static int call_pthread_create(void) {
    pthread_t thread;
    sink += pthread_create(&thread, NULL, idle, NULL); /* MARK pthread_create */
    pthread_join(thread, NULL);
    return -1;
}

static int (*const calls[])(void) = {
    call_open, call_fopen, call_socket, call_accept, call_pipe,
    call_dup, call_eventfd, call_epoll_create, call_pthread_create,
};

OWN static void once(int number) {
    int client = -1;
    if (calls[number] == call_accept) {
        client = socket(AF_INET, SOCK_STREAM, 0);
        sink += connect(client, (struct sockaddr *)&address, sizeof address);
    }
    phase(number);
    int fd = calls[number](); /* MARK once */
    phase(-1);
    close(fd);
    close(client);
}

int main(int argc, char **argv) {
    int rounds = argc > 1 ? atoi(argv[1]) : 1;
    socklen_t size = sizeof address;
    listener = socket(AF_INET, SOCK_STREAM, 0);
    address.sin_family = AF_INET;
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    sink += bind(listener, (struct sockaddr *)&address, sizeof address);
    sink += listen(listener, 16);
    sink += getsockname(listener, (struct sockaddr *)&address, &size);
    for (int round = 0; round < rounds; round++) {
        char order;
        if (argc > 2 && read(0, &order, 1) != 1)
            break;
        for (unsigned number = 0; number < sizeof calls / sizeof *calls; number++)
            once((int)number); /* MARK main */
    }
    return 0;
}
