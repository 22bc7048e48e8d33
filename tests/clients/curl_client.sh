#!/bin/sh
# A parser in shell: one curl for each page.
api=$1 count=$3 page=0
while [ "$page" -lt "$count" ]; do
  curl -gsS -o /dev/null -w 'status %{http_code}\n' -m 20 "$api/curl?products[page]=$page" || exit 1
  page=$((page + 1))
done
