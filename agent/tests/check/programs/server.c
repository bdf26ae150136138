// A TCP server: `server PORT [BEHAVIOUR,...]`. Answers the line of each connection with `ok` and closes it. Prints
// `listening` when it does, and with the port 0 also the one it got. On SIGTERM it finishes its connections and ends,
// unless one of the behaviours says otherwise. `// MARK name` names the line of the call.
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

// A function that a stack shows by its name: the compiler neither inlines nor copies it.
#define OWN __attribute__((noinline, noclone, noipa))
#define MOST 64
#define POOL 20
// It ends in any case, and so do the children that it leaves behind.
#define SECONDS_TO_LIVE 600
#define SECONDS_OF_CHILDREN 60
#define MS_TO_FINISH 30
#define SECONDS_OF_SLOW 3

enum {
    GOOD,
    DEAF,         // ignores SIGTERM
    SLOW,         // needs three seconds for its end
    STUCK_THREAD, // joins a thread that never ends
    LEAK_FD,      // leaks a file with each request
    LEAK_THREAD,  // leaks a thread with each request
    WARM,         // opens a file with each of the first 20 requests, and closes them in the end
    CHILDREN,     // leaves two children behind, which ignore SIGTERM
    KEEP,         // ends at once, whatever its connections still want
    BEHAVIOURS,
};

static const char *const names[BEHAVIOURS] = {
    "good", "deaf", "slow", "stuck-thread", "leak-fd", "leak-thread", "warm", "children", "keep",
};

static int behaves[BEHAVIOURS];
static volatile sig_atomic_t told_to_end;
static volatile long sink;

// 0 is the listener, the others are connections.
static struct pollfd polled[1 + MOST];
static nfds_t used;

static int pool[POOL];
static int pooled;

static inline int check(int result, const char *what)
{
    if (result < 0) {
        perror(what);
        exit(1);
    }
    return result;
}

static inline void check_number(int number, const char *what)
{
    errno = number;
    check(number == 0 ? 0 : -1, what);
}

static void on_term(int signal)
{
    (void)signal;
    told_to_end = 1;
}

OWN static void *stuck_worker(void *unused)
{
    for (;;) {
        sink += pause(); // MARK stuck_worker
    }
    return unused;
}

OWN static pthread_t start_worker(void)
{
    pthread_t thread;
    check_number(pthread_create(&thread, NULL, stuck_worker, NULL), "pthread_create"); // MARK start_worker
    return thread;
}

OWN static void join_worker(pthread_t thread)
{
    check_number(pthread_join(thread, NULL), "pthread_join"); // MARK join_worker
}

OWN static void leak_per_request(void)
{
    sink += check(open("/dev/null", O_RDONLY | O_CLOEXEC), "open"); // MARK leak_fd
}

OWN static void *blocked_worker(void *unused)
{
    for (;;) {
        sink += pause(); // MARK blocked_worker
    }
    return unused;
}

OWN static void leak_thread_per_request(void)
{
    pthread_t thread;
    check_number(pthread_create(&thread, NULL, blocked_worker, NULL), "pthread_create"); // MARK leak_thread
}

OWN static void fill_pool(void)
{
    if (pooled < POOL) {
        pool[pooled++] = check(open("/dev/null", O_RDONLY | O_CLOEXEC), "open"); // MARK warm
    }
}

// The child closes what whoever reads the output would wait for.
OWN static void start_child(void)
{
    pid_t child = check(fork(), "fork"); // MARK children
    if (child == 0) {
        close(0);
        close(1);
        close(2);
        signal(SIGTERM, SIG_IGN);
        alarm(SECONDS_OF_CHILDREN);
        for (;;) {
            pause();
        }
    }
}

static void serve_request(int connection)
{
    if (behaves[LEAK_FD]) {
        leak_per_request();
    }
    if (behaves[LEAK_THREAD]) {
        leak_thread_per_request();
    }
    if (behaves[WARM]) {
        fill_pool();
    }
    sink += send(connection, "ok\n", 3, MSG_NOSIGNAL);
}

// Whether the connection is done with.
static int serve(int connection)
{
    char text[256];
    ssize_t length = read(connection, text, sizeof text);
    if (length < 0 && errno == EAGAIN) {
        return 0;
    }
    if (length > 0 && memchr(text, '\n', (size_t)length) == NULL) {
        return 0;
    }
    if (length > 0) {
        serve_request(connection);
    }
    return 1;
}

// One connection, if there is one and room for it.
OWN static int accept_one(void)
{
    if (used == 1 + MOST) {
        return 0;
    }
    int fd = accept4(polled[0].fd, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK); // MARK accept
    if (fd >= 0) {
        polled[used++] = (struct pollfd){.fd = fd, .events = POLLIN};
    }
    return fd >= 0;
}

// Waits for the next events. Only here SIGTERM is let in.
static void turn(int most_ms)
{
    sigset_t none;
    struct timespec most = {.tv_nsec = most_ms * 1000000L};
    sigemptyset(&none);
    polled[0].events = used == 1 + MOST ? 0 : POLLIN;
    if (ppoll(polled, used, most_ms < 0 ? NULL : &most, &none) <= 0) {
        return;
    }
    for (nfds_t i = used; --i > 0;) {
        if (polled[i].revents != 0 && serve(polled[i].fd)) {
            close(polled[i].fd);
            polled[i] = polled[--used];
        }
    }
    if (polled[0].revents != 0) {
        accept_one();
    }
}

static long now_ms(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000 + now.tv_nsec / 1000000;
}

// Those that have come are served; those that say nothing are closed.
static void finish(void)
{
    while (accept_one()) {
    }
    close(polled[0].fd);
    // poll skips it.
    polled[0].fd = -1;
    long end = now_ms() + MS_TO_FINISH;
    for (long left; used > 1 && (left = end - now_ms()) > 0;) {
        turn((int)left);
    }
    while (used > 1) {
        close(polled[--used].fd);
    }
    while (pooled > 0) {
        close(pool[--pooled]);
    }
}

static void listen_on(int port)
{
    int on = 1;
    struct sockaddr_in address = {
        .sin_family = AF_INET,
        .sin_port = htons((unsigned short)port),
        .sin_addr.s_addr = htonl(INADDR_LOOPBACK),
    };
    socklen_t length = sizeof address;
    int fd = check(socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0), "socket");
    check(setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on), "SO_REUSEADDR");
    check(bind(fd, (struct sockaddr *)&address, length), "bind");
    check(listen(fd, 128), "listen");
    check(getsockname(fd, (struct sockaddr *)&address, &length), "getsockname");
    polled[used++] = (struct pollfd){.fd = fd, .events = POLLIN};
    if (port == 0) {
        printf("listening %d\n", ntohs(address.sin_port));
    } else {
        puts("listening");
    }
    fflush(stdout);
}

static int parse(char *behaviours)
{
    for (char *name = strtok(behaviours, ","); name != NULL; name = strtok(NULL, ",")) {
        int found = 0;
        while (found < BEHAVIOURS && strcmp(names[found], name) != 0) {
            found++;
        }
        if (found == BEHAVIOURS) {
            return 0;
        }
        behaves[found] = 1;
    }
    return 1;
}

int main(int argc, char **argv)
{
    sigset_t term;
    pthread_t worker = 0;
    if (argc < 2 || argc > 3 || (argc == 3 && !parse(argv[2]))) {
        fprintf(stderr, "usage: %s PORT [good|deaf|slow|stuck-thread|leak-fd|leak-thread|warm|children|keep,...]\n",
                argv[0]);
        return 2;
    }
    alarm(SECONDS_TO_LIVE);
    signal(SIGTERM, behaves[DEAF] ? SIG_IGN : on_term);
    sigemptyset(&term);
    sigaddset(&term, SIGTERM);
    sigprocmask(SIG_BLOCK, &term, NULL);
    // Before there is a listener that they would keep open.
    for (int i = 0; behaves[CHILDREN] && i < 2; i++) {
        start_child();
    }
    if (behaves[STUCK_THREAD]) {
        worker = start_worker();
    }
    listen_on(atoi(argv[1]));
    while (!told_to_end) {
        turn(-1);
    }
    if (behaves[KEEP]) {
        return 0;
    }
    finish();
    if (behaves[SLOW]) {
        sleep(SECONDS_OF_SLOW);
    }
    if (behaves[STUCK_THREAD]) {
        join_worker(worker);
    }
    return 0;
}
