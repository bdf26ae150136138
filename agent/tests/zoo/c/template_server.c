// Answers each request with a template. Closes the connection and leaks the template.
#include "common.h"

NAMED int open_template(void)
{
    return open_file("template.html");
}

NAMED void handle_request(int connection)
{
    char buffer[256];
    int template = open_template();
    check((int)read(connection, buffer, sizeof buffer), "read");
    ssize_t length = read(template, buffer, sizeof buffer);
    check((int)write(connection, buffer, (size_t)check((int)length, "read")), "write");
    close(connection);
}

static void request_for_ever(const struct sockaddr_in *address)
{
    for (;;) {
        char answer[256];
        int connection = connected_socket(address);
        check((int)write(connection, "GET /\n", 6), "write");
        check((int)read(connection, answer, sizeof answer), "read");
        close(connection);
        wait_seconds(0.5);
    }
}

int main(int argc, char **argv)
{
    struct sockaddr_in address;
    end_after(argc, argv);
    FILE *template = fopen("template.html", "w");
    if (template == NULL || fputs("<p>hello</p>\n", template) < 0 || fclose(template) != 0) {
        perror("template.html");
        return 1;
    }
    int listener = listening_socket(&address);
    if (fork_child() == 0) {
        request_for_ever(&address);
    }
    for (;;) {
        handle_request(check(accept4(listener, NULL, NULL, SOCK_CLOEXEC), "accept"));
    }
}
