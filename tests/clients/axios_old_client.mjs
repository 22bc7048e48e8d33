// A parser on axios 1.7 or older: the request for an https URL goes to the proxy in absolute form,
// in the clear and without CONNECT.
import http from "node:http";

const [api, , count] = process.argv.slice(2);
const proxy = new URL(process.env.HTTPS_PROXY);

function get(url) {
  const options = { host: proxy.hostname, port: proxy.port, path: url.href, headers: { Host: url.host } };
  return new Promise((resolve, reject) => {
    const request = http.get({ ...options, timeout: 20_000 }, (answer) => {
      answer.on("error", reject).on("end", () => resolve(answer.statusCode)).resume();
    });
    request.on("error", reject);
  });
}

for (let number = 0; number < Number(count); number++) {
  console.log("status", await get(new URL(`${api}/axios/${number}`)));
}
