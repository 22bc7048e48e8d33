import java.net.URI;
import java.net.http.HttpClient;
import java.net.http.HttpRequest;
import java.net.http.HttpRequest.BodyPublishers;
import java.net.http.HttpResponse.BodyHandlers;
import java.time.Duration;

/** A parser on Java's HttpClient as it comes: HTTP/2 where it can, the proxy of the system properties. */
class HttpClientParser {
    public static void main(String[] arguments) throws Exception {
        String api = arguments[0];
        int count = Integer.parseInt(arguments[2]);
        HttpClient client = HttpClient.newHttpClient();
        for (int number = 0; number < count; number++) {
            HttpRequest.Builder request = HttpRequest.newBuilder(URI.create(api + "/java/" + number));
            request.timeout(Duration.ofSeconds(20));
            if (number % 2 == 1) {
                request.POST(BodyPublishers.ofString("{\"id\":" + number + "}"));
            }
            int status = client.send(request.build(), BodyHandlers.discarding()).statusCode();
            System.out.println("status " + status);
        }
    }
}
