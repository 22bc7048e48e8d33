// A parser on Node's own fetch, which ignores proxy variables.
const [api, , count] = process.argv.slice(2);
for (let number = 0; number < Number(count); number++) {
  const options = number % 2 ? { method: "POST", body: JSON.stringify({ id: number }) } : {};
  const answer = await fetch(`${api}/fetch/${number}`, { ...options, signal: AbortSignal.timeout(20_000) });
  await answer.arrayBuffer();
  console.log("status", answer.status);
}
