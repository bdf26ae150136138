// Attaches a device each second, in a goroutine with an OS thread of its own. Leaks them: all block for ever.
package main

import (
	"runtime"
	"time"
)

func serveDevice(commands <-chan string) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	for command := range commands {
		println(command)
	}
}

//go:noinline
func openDevice() chan<- string {
	commands := make(chan string)
	go serveDevice(commands)
	return commands
}

//go:noinline
func attachDevices() {
	for {
		// Neither used nor closed.
		_ = openDevice()
		time.Sleep(time.Second)
	}
}

func main() {
	endAfterArgument()
	attachDevices()
}
