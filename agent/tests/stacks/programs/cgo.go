// The same with the linker of C, and code of C in front of Go's.
package main

// static int one(int value) { return value + 1; }
import "C"

func init() { phaseless = int(C.one(-1)) }
