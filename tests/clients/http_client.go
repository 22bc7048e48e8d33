// A parser on Go's net/http with the default transport.
package main

import (
	"fmt"
	"io"
	"log"
	"net/http"
	"os"
	"strconv"
	"strings"
	"time"
)

func ask(client *http.Client, url string, number int) (*http.Response, error) {
	if number%2 == 0 {
		return client.Get(url)
	}
	return client.Post(url, "application/json", strings.NewReader(fmt.Sprintf(`{"id":%d}`, number)))
}

func main() {
	api := os.Args[1]
	count, err := strconv.Atoi(os.Args[3])
	if err != nil {
		log.Fatal(err)
	}
	client := &http.Client{Timeout: 20 * time.Second}
	for number := 0; number < count; number++ {
		answer, err := ask(client, fmt.Sprintf("%s/go/%d", api, number), number)
		if err != nil {
			log.Fatal(err)
		}
		if _, err := io.Copy(io.Discard, answer.Body); err != nil {
			log.Fatal(err)
		}
		answer.Body.Close()
		fmt.Println("status", answer.StatusCode)
	}
}
