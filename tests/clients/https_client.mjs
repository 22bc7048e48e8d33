// A parser on Node's https module. Behind a proxy it does what axios and the proxy agents do:
// CONNECT with `Connection: close`, then TLS without ALPN inside.
import http from "node:http";
import https from "node:https";
import tls from "node:tls";

const [api, , count] = process.argv.slice(2);
const proxy = process.env.HTTPS_PROXY && new URL(process.env.HTTPS_PROXY);

class TunnelAgent extends https.Agent {
  createConnection({ host, port }, done) {
    const request = http.request({
      host: proxy.hostname,
      port: proxy.port,
      method: "CONNECT",
      path: `${host}:${port}`,
      headers: { Host: `${host}:${port}`, Connection: "close" },
    });
    request.on("connect", (answer, socket) => {
      if (answer.statusCode !== 200) done(new Error(`CONNECT: ${answer.statusCode}`));
      else done(null, tls.connect({ socket, servername: host }));
    });
    request.on("error", done).end();
  }
}

const agent = proxy && new TunnelAgent();

function send(url) {
  const { get } = url.protocol === "https:" ? https : http;
  return new Promise((resolve, reject) => {
    const request = get(url, { agent, timeout: 20_000 }, (answer) => {
      answer.on("error", reject).on("end", () => resolve(answer.statusCode)).resume();
    });
    request.on("error", reject);
  });
}

for (let number = 0; number < Number(count); number++) {
  console.log("status", await send(new URL(`${api}/https/${number}`)));
}
