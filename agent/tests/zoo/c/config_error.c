// Loads its configuration again and again. Leaks the file when it does not parse.
#include "common.h"

static void save(const char *path, const char *text)
{
    FILE *file = fopen(path, "w");
    if (file == NULL || fputs(text, file) < 0 || fclose(file) != 0) {
        perror(path);
        exit(1);
    }
}

NAMED int load_config(const char *path)
{
    char line[80];
    FILE *file = fopen(path, "re"); // leak
    if (file == NULL) {
        return -1;
    }
    while (fgets(line, sizeof line, file) != NULL) {
        if (strchr(line, '=') == NULL) {
            return -1;
        }
    }
    fclose(file);
    return 0;
}

NAMED void reload_loop(void)
{
    for (unsigned round = 0;; round++) {
        const char *path = round % 10 == 0 ? "broken.conf" : "good.conf";
        if (load_config(path) < 0) {
            fprintf(stderr, "%s: ignored\n", path);
        }
        wait_seconds(0.1);
    }
}

int main(int argc, char **argv)
{
    end_after(argc, argv);
    save("good.conf", "workers=4\nport=8080\n");
    save("broken.conf", "workers=4\nport 8080\n");
    reload_loop();
}
