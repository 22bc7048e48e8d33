<?php
// A parser on PHP's curl: one handle for all pages.
[, $api, , $count] = $argv;
$curl = curl_init();
curl_setopt_array($curl, [CURLOPT_RETURNTRANSFER => true, CURLOPT_TIMEOUT => 20]);
for ($page = 0; $page < (int) $count; $page++) {
    $query = http_build_query(['phrase' => 'книга', 'products' => ['page' => $page]]);
    curl_setopt($curl, CURLOPT_URL, "$api/php?$query");
    if (curl_exec($curl) === false) {
        fwrite(STDERR, curl_error($curl) . "\n");
        exit(1);
    }
    echo 'status ', curl_getinfo($curl, CURLINFO_RESPONSE_CODE), "\n";
}
