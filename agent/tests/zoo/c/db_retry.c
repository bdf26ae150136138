// Tries to reach a database that is down. Leaks the socket of each attempt.
#include "common.h"

NAMED int db_connect(const struct sockaddr_in *address)
{
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0); // leak
    if (fd < 0 || connect(fd, (const struct sockaddr *)address, sizeof *address) < 0) {
        return -1;
    }
    return fd;
}

NAMED int retry_loop(const struct sockaddr_in *address)
{
    int database;
    while ((database = db_connect(address)) < 0) {
        fprintf(stderr, "database: %s, next attempt in 1 s\n", strerror(errno));
        wait_seconds(1);
    }
    return database;
}

int main(int argc, char **argv)
{
    struct sockaddr_in address;
    end_after(argc, argv);
    // Bound, so that the port is nobody else's, but not listening.
    bound_socket(&address);
    return retry_loop(&address) < 0;
}
