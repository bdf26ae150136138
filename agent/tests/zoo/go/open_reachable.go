// Loads a chunk each second. Leaks its file, which stays reachable: no finalizer closes it.
package main

import (
	"io"
	"os"
	"time"
)

var chunks = map[int]*os.File{}

//go:noinline
func loadChunk(number int) int {
	file, err := os.Open("/etc/hostname") // leak
	check(err)
	chunks[number] = file
	text, err := io.ReadAll(file)
	check(err)
	return len(text)
}

//go:noinline
func ingest() {
	for number, bytes := 0, 0; ; number++ {
		bytes += loadChunk(number)
		time.Sleep(time.Second)
	}
}

func main() {
	endAfterArgument()
	ingest()
}
