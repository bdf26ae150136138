// Calls calls.c, which is compiled as C++ into a shared library.
int calls_main(int argc, char **argv);

int main(int argc, char **argv) { return calls_main(argc, argv); }
