#include "core.h"

#include <stdlib.h>

/* Linear probing; at most half full. */

static size_t home_of(const struct map *map, uint64_t key)
{
	key *= UINT64_C(0x9E3779B97F4A7C15);
	return (key ^ key >> 29) & map->mask;
}

static struct map_slot *find(const struct map *map, uint64_t key)
{
	if (!map->slots || !key)
		return NULL;
	for (size_t at = home_of(map, key);; at = (at + 1) & map->mask) {
		if (map->slots[at].key == key)
			return &map->slots[at];
		if (!map->slots[at].key)
			return NULL;
	}
}

static void insert(struct map *map, uint64_t key, void *value)
{
	size_t at = home_of(map, key);

	while (map->slots[at].key)
		at = (at + 1) & map->mask;
	map->slots[at] = (struct map_slot){key, value};
	map->used++;
}

static bool resize(struct map *map, size_t slots)
{
	struct map larger = {calloc(slots, sizeof(struct map_slot)), slots - 1, 0};

	if (!larger.slots)
		return false;
	for (size_t at = 0; map->slots && at <= map->mask; at++)
		if (map->slots[at].key)
			insert(&larger, map->slots[at].key, map->slots[at].value);
	free(map->slots);
	*map = larger;
	return true;
}

void *map_get(const struct map *map, uint64_t key)
{
	struct map_slot *slot = find(map, key);

	return slot ? slot->value : NULL;
}

bool map_has(const struct map *map, uint64_t key)
{
	return find(map, key) != NULL;
}

bool map_put(struct map *map, uint64_t key, void *value)
{
	struct map_slot *slot = find(map, key);

	if (!key)
		return false;
	if (slot) {
		slot->value = value;
		return true;
	}
	if (!map->slots || (map->used + 1) * 2 > map->mask + 1)
		if (!resize(map, map->slots ? (map->mask + 1) * 2 : 64))
			return false;
	insert(map, key, value);
	return true;
}

void *map_take(struct map *map, uint64_t key)
{
	struct map_slot *slot = find(map, key);
	size_t hole, at;
	void *value;

	if (!slot)
		return NULL;
	value = slot->value;
	hole = (size_t)(slot - map->slots);
	/* Whatever stood behind it because it was there moves up. */
	for (at = (hole + 1) & map->mask; map->slots[at].key; at = (at + 1) & map->mask) {
		size_t wanted = home_of(map, map->slots[at].key);

		if (((at - wanted) & map->mask) >= ((at - hole) & map->mask)) {
			map->slots[hole] = map->slots[at];
			hole = at;
		}
	}
	map->slots[hole] = (struct map_slot){0, NULL};
	map->used--;
	/* Memory comes back after a walk of millions. */
	if (map->mask >= 1023 && map->used * 8 < map->mask)
		resize(map, (map->mask + 1) / 4);
	return value;
}

void map_free(struct map *map)
{
	free(map->slots);
	*map = (struct map){NULL, 0, 0};
}
