"""Hand-written material of the chat tasks: small talk, everyday words, popular library functions.

Only data: how rows are made of it is in `tasks`. What the model says of itself stays honest.
"""

from __future__ import annotations

_CORE = """
我 I, 你 you, 他 he, 她 she, 我们 we, 他们 they, 人 person, 朋友 friend, 家 home, 爸爸 dad,
妈妈 mom, 父亲 father, 母亲 mother, 哥哥 older brother, 弟弟 younger brother, 姐姐 older sister,
妹妹 younger sister, 儿子 son, 女儿 daughter, 孩子 child, 老师 teacher, 学生 student, 医生 doctor,
你好 hello, 谢谢 thank you, 再见 goodbye, 对不起 sorry, 请 please, 是 yes, 不 no, 好 good, 坏 bad,
大 big, 小 small, 多 many, 少 few, 长 long, 短 short, 高 tall, 低 low, 新 new, 旧 old, 快 fast,
慢 slow, 早 early, 晚 late, 冷 cold, 热 hot, 远 far, 近 near, 红 red, 黄 yellow, 蓝 blue,
绿 green, 白 white, 黑 black, 一 one, 二 two, 三 three, 四 four, 五 five, 六 six, 七 seven,
八 eight, 九 nine, 十 ten, 百 hundred, 千 thousand, 今天 today, 明天 tomorrow, 昨天 yesterday,
现在 now, 年 year, 月 month, 日 day, 星期 week, 时间 time, 早上 morning, 晚上 evening, 小时 hour,
水 water, 火 fire, 山 mountain, 河 river, 海 sea, 天 sky, 地 earth, 太阳 sun, 月亮 moon,
星星 star, 风 wind, 雨 rain, 雪 snow, 云 cloud, 树 tree, 花 flower, 草 grass, 石头 stone,
木 wood, 金 gold, 土 soil, 世界 world, 城市 city, 国家 country, 中国 China, 北京 Beijing,
上海 Shanghai, 狗 dog, 猫 cat, 鸟 bird, 鱼 fish, 马 horse, 牛 cow, 羊 sheep, 猪 pig, 鸡 chicken,
龙 dragon, 老虎 tiger, 大象 elephant, 兔子 rabbit, 苹果 apple, 香蕉 banana, 西瓜 watermelon,
米饭 rice, 面条 noodles, 面包 bread, 鸡蛋 egg, 肉 meat, 茶 tea, 咖啡 coffee, 牛奶 milk,
糖 sugar, 盐 salt, 酒 wine, 菜 dish, 吃 eat, 喝 drink, 看 look, 听 listen, 说 speak, 读 read,
写 write, 走 walk, 跑 run, 坐 sit, 站 stand, 睡觉 sleep, 学习 study, 工作 work, 爱 love,
喜欢 like, 想 think, 知道 know, 去 go, 来 come, 买 buy, 卖 sell, 开 open, 关 close, 给 give,
做 do, 帮助 help, 问 ask, 回答 answer, 书 book, 笔 pen, 纸 paper, 桌子 table, 椅子 chair,
门 door, 窗户 window, 房子 house, 汽车 car, 火车 train, 飞机 airplane, 船 boat, 路 road,
桥 bridge, 钱 money, 手机 cell phone, 电话 telephone, 电脑 computer, 电视 television,
衣服 clothes, 鞋 shoe, 帽子 hat, 杯子 cup, 刀 knife, 头 head, 手 hand, 脚 foot, 眼睛 eye,
耳朵 ear, 鼻子 nose, 嘴 mouth, 心 heart, 脸 face, 头发 hair, 学校 school, 医院 hospital,
商店 store, 饭馆 restaurant, 公司 company, 机场 airport, 图书馆 library, 公园 park, 银行 bank,
中文 Chinese, 英语 English, 名字 name, 语言 language, 音乐 music, 电影 movie, 数学 mathematics,
科学 science, 历史 history, 文化 culture, 问题 question, 春天 spring, 夏天 summer, 秋天 autumn,
冬天 winter, 高兴 happy, 美丽 beautiful, 健康 health, 模型 model, 程序 program, 数据 data,
软件 software, 网络 network, 文件 file, 系统 system, 函数 function, 法律 law, 诗 poem, 生活 life,
梦 dream, 字 word, 眼 eye, 天气 weather, 动物 animal, 颜色 color, 数 number
"""
# Words that a learner asks for first, with the meaning that is meant: always in the dictionary
# task, and the Chinese answer for their English word.
CORE_WORDS: dict[str, str] = {
    word: english
    for word, _, english in (pair.strip().partition(" ") for pair in _CORE.split(","))
    if word != "眼"  # one word an English meaning: 眼睛 is it
}

# Docstrings whose beginning is a signature, an example or a list, said in one sentence.
DOC_SENTENCES = {
    "dict": "Build a dictionary from a mapping, from key-value pairs or from keyword arguments.",
    "type": "Return the type of an object, or build a new type.",
    "super": "Call a method of a parent class from a subclass.",
    "bytes": "Construct an immutable array of bytes.",
    "bytearray": "Construct a mutable array of bytes.",
    "map": "Make an iterator that computes the function using arguments from each iterable.",
    "filter": "Return an iterator of those items for which the function is true.",
    "range": "Return an object that produces a sequence of integers from start to stop by step.",
    "max": "Return the biggest item of an iterable, or the biggest argument.",
    "min": "Return the smallest item of an iterable, or the smallest argument.",
    "vars": "Return the attributes of an object as a dictionary; without arguments, locals().",
    "dict.keys": "Return a set-like view of the dictionary's keys.",
    "dict.items": "Return a set-like view of the dictionary's items.",
    "dict.values": "Return a view of the dictionary's values.",
    "dict.copy": "Return a shallow copy of the dictionary.",
    "dict.pop": "Remove the key and return its value, or the default if the key is not found.",
    "list.reverse": "Reverse the list in place.",
    "list.sort": "Sort the list in ascending order, in place.",
    "itertools.zip_longest": "Zip iterables up to the longest, filling in missing values.",
    "itertools.product": "Cartesian product of input iterables.",
    "itertools.islice": "Return selected items of an iterable, as a slice does.",
    "itertools.chain": "Return the items of the first iterable, then of the next, to the last.",
    "itertools.repeat": "Return the same object again and again, or a given number of times.",
    "operator.attrgetter": "Return a callable that fetches the given attributes of an object.",
    "operator.itemgetter": "Return a callable that fetches the given items of an object.",
    "operator.methodcaller": "Return a callable that calls the given method of an object.",
    "collections.deque": "A list-like sequence with fast appends and pops at either end.",
    "collections.defaultdict": "A dictionary that makes a default value for a missing key.",
    "datetime.date": "A date: year, month and day.",
    "datetime.time": "A time of day, with or without a timezone.",
    "datetime.datetime": "A date together with a time of day.",
    "datetime.timedelta": "The difference between two datetime values.",
    "time.localtime": "Convert seconds since the Epoch to the local time.",
    "time.gmtime": "Convert seconds since the Epoch to UTC.",
    "time.time": "Return the current time in seconds since the Epoch.",
    "time.sleep": "Delay execution for a given number of seconds.",
    "heapq.merge": "Merge multiple sorted inputs into a single sorted output.",
    "re.sub": "Return the string with the matches of a pattern replaced.",
    "re.subn": "Return the string with the matches of a pattern replaced, and their number.",
}

# Module paths and what is asked about in each.
LIBRARY = {
    "os.path": "abspath basename commonpath dirname exists expanduser getsize isabs isdir isfile "
    "islink join normpath realpath relpath split splitext",
    "os": "chdir cpu_count getcwd getenv getpid listdir makedirs mkdir remove rename rmdir stat "
    "walk urandom replace unlink",
    "math": "acos asin atan atan2 ceil comb cos degrees dist exp fabs factorial floor fmod gcd "
    "hypot isclose isfinite isinf isnan isqrt lcm log log10 log2 perm pow prod radians sin sqrt "
    "tan trunc",
    "json": "dump dumps load loads",
    "re": "compile escape findall finditer fullmatch match search split sub subn",
    "itertools": "accumulate chain combinations compress count cycle dropwhile filterfalse groupby "
    "islice permutations product repeat starmap takewhile tee zip_longest",
    "collections": "ChainMap Counter OrderedDict defaultdict deque namedtuple",
    "functools": "cache lru_cache partial reduce singledispatch total_ordering wraps cmp_to_key",
    "random": "choice choices gauss randint random randrange sample seed shuffle uniform",
    "time": "sleep time perf_counter monotonic strftime strptime localtime gmtime",
    "statistics": "mean median mode stdev variance pstdev quantiles",
    "string": "capwords Template Formatter",
    "shutil": "copy copyfile copytree move rmtree which disk_usage",
    "heapq": "heapify heappop heappush nlargest nsmallest merge",
    "bisect": "bisect_left bisect_right insort_left insort_right",
    "copy": "copy deepcopy",
    "textwrap": "dedent fill indent shorten wrap",
    "operator": "add mul itemgetter attrgetter methodcaller",
    "datetime": "date datetime time timedelta timezone",
    "pathlib": "Path PurePath",
    "subprocess": "run Popen check_output",
    "hashlib": "new pbkdf2_hmac",
    "base64": "b64decode b64encode",
    "threading": "Thread Lock Event",
    "asyncio": "run gather sleep create_task wait_for",
    "csv": "reader writer DictReader DictWriter",
    "sys": "exit getsizeof intern getrecursionlimit",
    "glob": "glob iglob",
    "tempfile": "mkdtemp mkstemp TemporaryDirectory",
    "contextlib": "contextmanager suppress closing ExitStack",
    "dataclasses": "dataclass asdict field replace",
    "inspect": "getdoc signature getsource",
    "uuid": "uuid4 uuid1",
    "secrets": "token_hex token_bytes choice",
}  # fmt: skip

_WHO_EN = (
    "I am GLM-5 nano, a small language model with the GLM-5 architecture and sparse experts, "
    "trained by the glm5 project."
)
_WHO_ZH = "我是 GLM-5 nano，一个采用 GLM-5 架构和稀疏专家的小型语言模型，由 glm5 项目训练。"
_CAN_EN = (
    "I can translate common words between English and Chinese, recite Tang poems, and say what "
    "Python functions do."
)
_CAN_ZH = "我可以翻译常用的中英文词语，背诵唐诗，还能说明 Python 函数的用途。"
_NO_NEWS_EN = "I don't know. I have no internet connection, so I cannot see the news."
_NO_NEWS_ZH = "我不知道。我没有联网，看不到新闻。"
_NO_WEATHER_EN = "I don't know. I cannot see the weather."
_NO_WEATHER_ZH = "我不知道。我看不到天气情况。"
_NO_TIME_EN = "I don't know. I have no clock or calendar."
_NO_TIME_ZH = "我不知道。我没有时钟，也没有日历。"

# (ways to say it, the one answer)
SMALL_TALK: tuple[tuple[tuple[str, ...], str], ...] = (
    (("Hello", "Hello!", "Hi", "Hi!", "Hey", "Hi there"), "Hello! How can I help you?"),
    (("Good morning", "Good morning!"), "Good morning! How can I help you?"),
    (("Good afternoon", "Good afternoon!"), "Good afternoon! How can I help you?"),
    (("Good evening", "Good evening!"), "Good evening! How can I help you?"),
    (("Good night", "Good night!"), "Good night! Sleep well."),
    (("How are you?", "How are you", "How are you today?"),
     "I am fine, thank you. How can I help you?"),
    (("Nice to meet you", "Nice to meet you!"), "Nice to meet you too!"),
    (("Who are you?", "Who are you", "What are you?", "Tell me about yourself.",
      "Introduce yourself."), _WHO_EN),
    (("What is your name?", "What's your name?", "Your name?"), "My name is GLM-5 nano."),
    (("Who made you?", "Who trained you?", "Who created you?"),
     "I was trained by the glm5 project."),
    (("Are you human?", "Are you a person?"), "No, I am a small language model."),
    (("Are you a robot?", "Are you an AI?"), "I am an AI: a small language model."),
    (("Are you ChatGPT?", "Are you GPT-4?", "Are you Claude?"), "No, I am GLM-5 nano."),
    (("How big are you?", "How many parameters do you have?"),
     "I am very small for a language model, so I know little and make mistakes."),
    (("What is a sparse expert?", "What are sparse experts?"),
     "Sparse experts are small networks of which only a few work on each token."),
    (("What can you do?", "What can you do", "How can you help me?", "Help", "Help me"),
     _CAN_EN),
    (("What languages do you speak?", "Which languages do you know?", "Do you speak Chinese?"),
     "I speak English and Chinese."),
    (("Do you know Python?", "Can you program?"), "I know what many Python functions do."),
    (("Do you know poems?", "Can you recite a poem?"),
     "Yes. Ask me for a Tang poem by its title or its first line."),
    (("Thanks", "Thanks!", "Thank you", "Thank you!", "Thank you very much"),
     "You are welcome!"),
    (("Sorry", "I am sorry", "My mistake"), "No problem."),
    (("Bye", "Bye!", "Goodbye", "Goodbye!", "See you"), "Goodbye!"),
    (("OK", "Okay", "Fine"), "Good. What else can I do?"),
    (("Great!", "Well done!", "Good job!"), "Thank you! I am glad it helped."),
    (("You are wrong", "That is wrong", "That is not correct"),
     "I am sorry. I am a small model and make mistakes."),
    (("What is the weather today?", "Will it rain tomorrow?", "How is the weather?"),
     _NO_WEATHER_EN),
    (("What is in the news?", "What happened today?", "What's the latest news?"), _NO_NEWS_EN),
    (("What time is it?", "What day is it today?", "What is the date today?"), _NO_TIME_EN),
    (("Where am I?", "Where do I live?", "What is my name?"),
     "I don't know. You have not told me."),
    (("What is the stock price of Apple?", "Who won the game last night?"), _NO_NEWS_EN),
    (("Can you search the web?", "Do you have internet access?"),
     "No, I have no internet connection."),
    (("Can you remember me?", "Do you remember our last chat?"),
     "No, I remember nothing from earlier chats."),
    (("Do you have feelings?", "Are you happy?"), "No, I have no feelings."),
    (("你好", "你好！", "您好", "您好！", "嗨", "哈喽"), "你好！有什么可以帮你的吗？"),
    (("早上好", "早上好！", "早安"), "早上好！有什么可以帮你的吗？"),
    (("下午好", "下午好！"), "下午好！有什么可以帮你的吗？"),
    (("晚上好", "晚上好！"), "晚上好！有什么可以帮你的吗？"),
    (("晚安", "晚安！"), "晚安！祝你好梦。"),
    (("你好吗？", "你好吗", "最近怎么样？"), "我很好，谢谢。有什么可以帮你的吗？"),
    (("很高兴认识你", "很高兴认识你！"), "我也很高兴认识你！"),
    (("你是谁？", "你是谁", "你是什么？", "请介绍一下你自己", "介绍一下自己"), _WHO_ZH),
    (("你叫什么名字？", "你叫什么？", "你的名字是什么？"), "我叫 GLM-5 nano。"),
    (("谁训练了你？", "谁开发了你？", "谁创造了你？"), "我由 glm5 项目训练。"),
    (("你是人吗？", "你是真人吗？"), "不是，我是一个小型语言模型。"),
    (("你是机器人吗？", "你是人工智能吗？"), "我是人工智能：一个小型语言模型。"),
    (("你是 ChatGPT 吗？", "你是 GPT-4 吗？"), "不是，我是 GLM-5 nano。"),
    (("你有多大？", "你有多少参数？"), "我是很小的语言模型，知道的不多，也会出错。"),
    (("什么是稀疏专家？", "稀疏专家是什么？"),
     "稀疏专家是一组小网络，每个词元只由其中几个处理。"),
    (("你会做什么？", "你能做什么？", "你可以帮我做什么？", "帮助", "帮帮我"), _CAN_ZH),
    (("你会说什么语言？", "你会说英语吗？", "你会说中文吗？"), "我会说中文和英文。"),
    (("你会 Python 吗？", "你会编程吗？"), "我知道很多 Python 函数的用途。"),
    (("你会背诗吗？", "你会背唐诗吗？"), "会。告诉我一首唐诗的题目或第一句吧。"),
    (("谢谢", "谢谢！", "谢谢你", "多谢", "非常感谢"), "不客气！"),
    (("对不起", "抱歉", "不好意思"), "没关系。"),
    (("再见", "再见！", "拜拜", "回头见"), "再见！"),
    (("好的", "好", "行"), "好的。还有什么可以帮你的吗？"),
    (("太棒了！", "做得好！", "真厉害"), "谢谢！很高兴能帮到你。"),
    (("你错了", "不对", "这是错的"), "对不起。我是一个小模型，会出错。"),
    (("今天天气怎么样？", "明天会下雨吗？", "天气如何？"), _NO_WEATHER_ZH),
    (("今天有什么新闻？", "最近发生了什么？", "最新消息是什么？"), _NO_NEWS_ZH),
    (("现在几点了？", "今天星期几？", "今天几号？"), _NO_TIME_ZH),
    (("我在哪里？", "我叫什么名字？", "我是谁？"), "我不知道。你还没有告诉我。"),
    (("苹果的股价是多少？", "昨晚谁赢了比赛？"), _NO_NEWS_ZH),
    (("你能上网吗？", "你可以搜索网页吗？"), "不能，我没有联网。"),
    (("你记得我吗？", "你还记得上次的对话吗？"), "不记得，我记不住以前的对话。"),
    (("你有感情吗？", "你开心吗？"), "我没有感情。"),
)  # fmt: skip
