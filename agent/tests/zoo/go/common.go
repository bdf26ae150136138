// What the Go programs share: how they end, and a peer in a process of its own.
package main

import (
	"log"
	"os"
	"os/exec"
	"strconv"
	"syscall"
	"time"
)

// endAfterArgument ends the process after the seconds of its first argument.
func endAfterArgument() {
	seconds, err := strconv.Atoi(os.Args[1])
	check(err)
	time.AfterFunc(time.Duration(seconds)*time.Second, func() { os.Exit(0) })
}

func check(err error) {
	if err != nil {
		log.Fatal(err)
	}
}

// peerWord is the word with which startPeer started this process, if it did.
func peerWord() (string, bool) {
	if len(os.Args) < 3 {
		return "", false
	}
	return os.Args[2], true
}

// startPeer runs this program again with a word, and with the files as fd 3 and up. It ends with this process.
func startPeer(word string, files ...*os.File) {
	program, err := os.Executable()
	check(err)
	peer := exec.Command(program, os.Args[1], word)
	peer.Stderr = os.Stderr
	peer.ExtraFiles = files
	peer.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	check(peer.Start())
}
